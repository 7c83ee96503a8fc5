"""High-fidelity generative image compression: photos to `.hfc` files and back, and every part to build upon.

    from hific_nb import Codec, list_models, HfcError
    codec = Codec.from_pretrained("hific-lite")
    data = codec.compress("photo.jpg")
    image = codec.decompress(data)
"""

__version__ = "0.1.0"
__all__ = ["Codec", "HfcError", "HificError", "list_models"]

_HOMES = {"Codec": "codec", "HfcError": "hfc", "HificError": "config", "list_models": "zoo"}


def __getattr__(name):  # PEP 562: torch is loaded when a Codec is first asked for, not by the import
    if name not in _HOMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__(): return sorted([*globals(), *_HOMES])
