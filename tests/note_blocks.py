"""The code blocks of the user's note on sharpness-aware minimization, word for word, without their import lines."""

ADAPTIVE = r'''
class ASAM(SAM):
    """
    Adaptive Sharpness-Aware Minimization.

    Scale-invariant version of SAM that adapts perturbation size
    to each parameter's magnitude.

    Reference: https://arxiv.org/abs/2102.11600
    """

    def __init__(self, params, base_optimizer: type, rho: float = 2.0, **kwargs):
        # ASAM uses ~10x larger rho than SAM
        super().__init__(params, base_optimizer, rho=rho, adaptive=True, **kwargs)
'''

TRAINING_LOOP = r'''
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader


def train_with_sam(
    model: nn.Module,
    train_loader: DataLoader,
    epochs: int = 100,
    lr: float = 0.1,
    rho: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    device: str = "cuda"
):
    """
    Train a model using SAM optimizer.

    Note: Training runs ~2x slower due to two forward-backward passes.
    """
    model = model.to(device)

    # Create SAM optimizer wrapping SGD
    optimizer = SAM(
        model.parameters(),
        base_optimizer=torch.optim.SGD,
        rho=rho,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay
    )

    # Learning rate scheduler
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer.base_optimizer,  # Apply to base optimizer!
        T_max=epochs
    )

    for epoch in range(epochs):
        model.train()
        total_loss = 0.0
        correct = 0
        total = 0

        for inputs, targets in train_loader:
            inputs, targets = inputs.to(device), targets.to(device)

            # === First forward-backward pass ===
            # Enable running stats for BatchNorm (first pass only)
            enable_running_stats(model)

            outputs = model(inputs)
            loss = F.cross_entropy(outputs, targets)
            loss.backward()

            optimizer.first_step(zero_grad=True)

            # === Second forward-backward pass ===
            # Disable running stats for BatchNorm (second pass)
            disable_running_stats(model)

            outputs_second = model(inputs)
            loss_second = F.cross_entropy(outputs_second, targets)
            loss_second.backward()

            optimizer.second_step(zero_grad=True)

            # Track metrics (use first pass loss)
            total_loss += loss.item()
            _, predicted = outputs.max(1)
            total += targets.size(0)
            correct += predicted.eq(targets).sum().item()

        scheduler.step()

        accuracy = 100.0 * correct / total
        avg_loss = total_loss / len(train_loader)

        print(f"Epoch {epoch+1}/{epochs}: Loss={avg_loss:.4f}, Acc={accuracy:.2f}%")

    return model
'''

EFFICIENT = r'''
class EfficientSAM(SAM):
    """
    Efficient SAM that only perturbs a subset of parameters.

    Reduces overhead from 2x to ~1.5x forward-backward passes.
    """

    def __init__(
        self,
        params,
        base_optimizer: type,
        rho: float = 0.05,
        perturbation_ratio: float = 0.5,  # Perturb only 50% of params
        **kwargs
    ):
        super().__init__(params, base_optimizer, rho, **kwargs)
        self.perturbation_ratio = perturbation_ratio

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False):
        """Only perturb top gradient-magnitude parameters."""
        # Collect all gradients with their parameter references
        grad_param_pairs = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    grad_param_pairs.append((p.grad.norm().item(), p, group))

        # Sort by gradient magnitude
        grad_param_pairs.sort(key=lambda x: x[0], reverse=True)

        # Perturb only top fraction
        n_perturb = int(len(grad_param_pairs) * self.perturbation_ratio)

        grad_norm = self._grad_norm()

        for i, (_, p, group) in enumerate(grad_param_pairs):
            self.state[p]["old_p"] = p.data.clone()

            if i < n_perturb:
                scale = group["rho"] / (grad_norm + 1e-12)
                e_w = p.grad * scale
                p.add_(e_w)

        if zero_grad:
            self.zero_grad()
'''

LOOK = r'''
class LookSAM(SAM):
    """
    LookSAM: Only apply SAM every k steps.

    Reduces overhead significantly while maintaining benefits.
    """

    def __init__(
        self,
        params,
        base_optimizer: type,
        rho: float = 0.05,
        k: int = 5,  # Apply SAM every k steps
        **kwargs
    ):
        super().__init__(params, base_optimizer, rho, **kwargs)
        self.k = k
        self.step_count = 0

    def should_apply_sam(self) -> bool:
        return self.step_count % self.k == 0

    @torch.no_grad()
    def step(self, closure=None):
        self.step_count += 1

        if self.should_apply_sam():
            # Apply full SAM
            super().step(closure)
        else:
            # Just apply base optimizer
            self.base_optimizer.step()
'''

MOMENTUM = r'''
class MomentumSAM(SAM):
    """
    SAM with momentum for perturbation direction.

    Smooths the perturbation direction across steps.
    """

    def __init__(
        self,
        params,
        base_optimizer: type,
        rho: float = 0.05,
        perturbation_momentum: float = 0.9,
        **kwargs
    ):
        super().__init__(params, base_optimizer, rho, **kwargs)
        self.perturbation_momentum = perturbation_momentum

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False):
        grad_norm = self._grad_norm()

        for group in self.param_groups:
            scale = group["rho"] / (grad_norm + 1e-12)

            for p in group["params"]:
                if p.grad is None:
                    continue

                self.state[p]["old_p"] = p.data.clone()

                # Initialize or update momentum buffer
                if "perturbation_buffer" not in self.state[p]:
                    self.state[p]["perturbation_buffer"] = p.grad.clone()
                else:
                    buf = self.state[p]["perturbation_buffer"]
                    buf.mul_(self.perturbation_momentum).add_(
                        p.grad, alpha=1 - self.perturbation_momentum
                    )

                # Use momentum buffer for perturbation
                e_w = self.state[p]["perturbation_buffer"] * scale
                p.add_(e_w)

        if zero_grad:
            self.zero_grad()
'''

RELEVANCE = r'''
def train_relevance_model_with_sam(
    model,
    train_loader,
    epochs: int = 100,
    rho: float = 0.05
):
    """
    Train relevance prediction with SAM for robust generalization.
    """
    optimizer = SAM(
        model.parameters(),
        base_optimizer=torch.optim.AdamW,
        rho=rho,
        lr=1e-4,
        weight_decay=0.01
    )

    for epoch in range(epochs):
        for images, texts, targets in train_loader:
            # First forward-backward
            relevance = model(images, texts)
            loss = F.mse_loss(relevance, targets)
            loss.backward()
            optimizer.first_step(zero_grad=True)

            # Second forward-backward
            relevance = model(images, texts)
            loss = F.mse_loss(relevance, targets)
            loss.backward()
            optimizer.second_step(zero_grad=True)

        # Evaluate sharpness
        sharpness = compute_sam_sharpness(
            model, F.mse_loss, images, targets
        )
        print(f"Epoch {epoch}: Loss={loss.item():.4f}, Sharpness={sharpness:.4f}")
'''
