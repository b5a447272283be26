"""Matrix-free linear algebra: an operator, and algorithms that see only its matvecs."""
