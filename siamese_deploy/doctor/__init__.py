"""`siamese doctor`: what is installed, what really starts, and why not; docs/doctor.md.

doctor     the examination and its verdict
packages   ONNX Runtime's packages and NVIDIA's libraries     checks    everything else that is looked at
"""

from siamese_deploy.doctor.doctor import answer, examine

__all__ = ["answer", "examine"]
