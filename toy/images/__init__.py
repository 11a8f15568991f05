"""The image rungs: one module for each stage, on scikit-learn's digits, MNIST or Fashion-MNIST (`python -m toy.mnist`)."""
