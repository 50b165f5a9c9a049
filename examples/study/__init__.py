"""Many ways to train the same small networks on Fashion-MNIST, and how robust each is: parts of fashion_mnist.py."""
