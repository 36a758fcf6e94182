"""Learn the Siamese network with PyTorch.

Reading order: config, model, augment, data, checkpoint, torch_verifier, train, cli.
"""
