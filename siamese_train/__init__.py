"""Learn the Siamese network with PyTorch.

Reading order: config, model, augment, data, weights, checkpoint, torch_verifier, resume, train, cli.
"""
