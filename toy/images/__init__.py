"""The image rungs, one module for each stage: scikit-learn's digits, MNIST, Fashion-MNIST (`python -m toy.mnist`)."""
