"""Hand-over of sequences between engines, on the step thread: what is sent when, and what is taken over.

Pages belong to `memory`, plans to `scheduler`, bytes to `kvtransfer`; nothing here waits or copies.
"""

from xllm.engine.moving.mover import Mover

__all__ = ["Mover"]
