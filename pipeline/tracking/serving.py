"""What a registered model runs: logged as source code beside its checkpoint and the `cvft` package, without a pickle.

MLflow executes this file when a model is loaded; nothing imports it. It needs torch, numpy, safetensors and
mlflow alone.

Shape letters: N images of a view, H x W pixels, D descriptor values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from numpy.typing import NDArray

from cvft.checkpoint import load_model
from cvft.preprocess import Preprocess

BATCH_SIZE = 32


class Embedder(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Descriptors of ground and aerial images; each view needs nothing of the other."""

    # The signature says what `predict` takes. MLflow would read type hints as another signature and warns without.
    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        """Build the network of the checkpoint, on a GPU where there is one."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, info = load_model(Path(context.artifacts["checkpoint"]))
        self.model = model.to(self.device)
        self.preprocess = Preprocess(info.preprocess)

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        """Embed images.

        Args:
            context: Unused.
            model_input: `ground` and `aerial`, each uint8 [N, H, W, 3] in RGB at the checkpoint's input size,
                MLflow having checked both. The two N may differ; to embed one view alone, give the other as
                [0, H, W, 3].
            params: Unused.

        Returns:
            `ground` and `aerial`: float32 [N, D], of unit length.
        """
        del context, params
        return {
            "ground": self._embed(self.model.embed_ground, model_input["ground"]),
            "aerial": self._embed(self.model.embed_aerial, model_input["aerial"]),
        }

    @torch.inference_mode()
    def _embed(self, embed: Any, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        parts = [np.empty((0, self.model.descriptor_dim), dtype=np.float32)]
        for start in range(0, len(pixels), BATCH_SIZE):
            part = torch.from_numpy(np.ascontiguousarray(pixels[start : start + BATCH_SIZE]))
            parts.append(embed(self.preprocess(part.to(self.device))).cpu().numpy())
        return np.concatenate(parts)


mlflow.models.set_model(Embedder())
