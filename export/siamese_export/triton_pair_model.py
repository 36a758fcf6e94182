"""The pair model of a Triton model repository: two pictures in, score and decision out. Runs inside the server only.

`siamese_export.triton` copies this file into the repository. There it imports nothing of the toolkit: numpy, and the
module that Triton's python backend brings. The pictures of all requests at hand are embedded together.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]


class TritonPythonModel:
    """left, right uint8 (P, H, W, 3) -> scores float32 (P, 1), is_same bool (P, 1)."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self.threshold = float(parameters["threshold"]["string_value"])
        self.largest_batch = int(parameters["largest_batch"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order: its scores, or an error; never a score outside [0, 1]."""
        lefts, rights = (
            [pb_utils.get_input_tensor_by_name(request, side).as_numpy() for request in requests]
            for side in ("left", "right")
        )
        try:
            scores = self._score(np.concatenate(lefts + rights))
        except pb_utils.TritonModelException as error:
            return [_refusal(str(error)) for _ in requests]
        ends = np.cumsum([len(left) for left in lefts])
        return [self._response(own) for own in np.split(scores, ends[:-1])]

    def _score(self, images: Any) -> Any:
        """(2P, H, W, 3) uint8, first all left ones and then all right ones -> (P, 1) float32."""
        parts = [
            _call("siamese_backbone", "embeddings", images=images[start : start + self.largest_batch])
            for start in range(0, len(images), self.largest_batch)
        ]
        left, right = np.split(np.concatenate(parts), 2)
        return _call("siamese_head", "scores", left=left, right=right)

    def _response(self, scores: Any) -> Any:
        damaged = scores[~((scores >= 0) & (scores <= 1))]  # NaN too: it compares as false
        if damaged.size:
            return _refusal(f"the network gives the score {damaged[0]}; expected 0 to 1: the model is damaged")
        is_same = scores.astype(np.float64) >= self.threshold
        return pb_utils.InferenceResponse([pb_utils.Tensor("scores", scores), pb_utils.Tensor("is_same", is_same)])


def _call(model: str, output: str, **inputs: Any) -> Any:
    """One output of another model of this server.

    Raises:
        TritonModelException: it failed, or is not loaded.
    """
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=[output],
        inputs=[pb_utils.Tensor(name, value) for name, value in inputs.items()],
        # A model on a GPU would otherwise leave its output there, where numpy cannot read it.
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )
    response = request.exec()
    if response.has_error():
        raise pb_utils.TritonModelException(f"{model}: {response.error().message()}")
    # Copied: the array is a view of the response's memory, and nothing promises that it outlives the response.
    return pb_utils.get_output_tensor_by_name(response, output).as_numpy().copy()


def _refusal(message: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"siamese: {message}"))
