"""Split a trained network into two ONNX graphs and prove that they answer like it.

Reading order: graphs, parity, export, cli.
"""
