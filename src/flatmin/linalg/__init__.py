"""Matrix-free linear algebra: an operator protocol, and algorithms that see only its Hessian-vector products."""
