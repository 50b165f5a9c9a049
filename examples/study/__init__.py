"""Many ways to train the same small networks on Fashion-MNIST, and what each withstands: parts of fashion_mnist.py."""
