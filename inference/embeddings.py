"""Write a file of embeddings, with which `infer.py embeddings=` animates without a model's encoders.

    python -m inference.embeddings model=FOLDER output=words.safetensors prompt="a fan dances"
    python -m inference.embeddings model=FOLDER output=words.safetensors reference=photo.png size=[832,480]

The file holds `prompt` and `negative_prompt`, and with reference= also `image`. Of FOLDER only model_index.json and
the folders of these encoders are read, so that it may lie on another machine than the rest of the model.
"""

from pathlib import Path

from core.config import load_config
from core.errors import UserError, run_command
from core.files import check_paths
from inference.config import EmbeddingsConfig


def main(arguments: list[str]) -> None:
    config = load_config(EmbeddingsConfig, arguments, about=__doc__)
    check_paths({"model": config.model, "reference": config.reference})
    if Path(config.output).suffix != ".safetensors" or Path(config.output).is_dir():
        raise UserError(f"output={config.output} must be a file that ends in .safetensors")
    # Networks take seconds to import, which wrong arguments need not wait for.
    from inference.words import write_embeddings

    for name, tensor in write_embeddings(config).items():
        print(f"{name}: {' x '.join(map(str, tensor.shape))}, {str(tensor.dtype).removeprefix('torch.')}")
    print(f"written: {config.output}")


if __name__ == "__main__":
    run_command(main)
