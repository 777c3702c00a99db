"""The trained encoders that come with the package, by name."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "pretrained"


def pretrained_file(name: str | Path) -> Path | None:
    """The weights of the encoder with this name, a ResNet without heads, beside its model card.

    None if there is none, or if the user has a file or folder of this name.
    """
    file = FOLDER / f"{name}.safetensors"
    return file if Path(name).name == str(name) and file.is_file() and not Path(name).exists() else None
