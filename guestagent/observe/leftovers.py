"""What a life that was cut short has left, by its journal."""

from guestagent.engine.journal import WHOLE, Journal

__all__ = ("left_behind",)


def left_behind(directory: str) -> dict[str, tuple[str, ...]]:
    """Return layers, overlays and what was unfinished, each as text.

    Raises:
        OSError: the journal cannot be read.
    """
    journal = Journal(directory)
    layers: list[str] = []
    overlays: list[str] = []
    unfinished: list[str] = []
    for layer in journal.read_layers():
        text = f"{layer.live.spec.layer_id} at {layer.live.spec.mount_point}"
        (layers if layer.state == WHOLE else unfinished).append(text)
    for overlay in journal.read_overlays():
        text = f"{overlay.live.spec.overlay_id} at {overlay.live.spec.mount_point}"
        (overlays if overlay.state == WHOLE else unfinished).append(text)
    return {
        "layers": tuple(layers),
        "overlays": tuple(overlays),
        "unfinished": tuple(unfinished),
    }
