"""The one training loop, its recipe protocol, methods and run folders."""
