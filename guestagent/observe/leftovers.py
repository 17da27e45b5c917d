"""What a life that was cut short has left, by its journal."""

from guestagent.engine.journal import Journal

__all__ = ("left_behind",)


def left_behind(directory: str) -> dict[str, tuple[str, ...]]:
    """Return layers, overlays and what was unfinished, each as text.

    Raises:
        OSError: the journal cannot be read.
    """
    written = Journal(directory).read()
    return {
        "layers": tuple(
            f"{live.spec.layer_id} at {live.spec.mount_point}" for live in written.layers
        ),
        "overlays": tuple(
            f"{live.spec.overlay_id} at {live.spec.mount_point}" for live in written.overlays
        ),
        "unfinished": (
            *(f"{traces.layer_id} at {traces.mount_point}" for traces in written.begun_layers),
            *(
                f"{live.spec.overlay_id} at {live.spec.mount_point}"
                for live in written.begun_overlays
            ),
        ),
    }
