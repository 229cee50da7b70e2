"""Whether one more request may enter: counts, predicted memory, predicted wait, and a fair part for each.

Pure: time and chance are passed in. Which instance serves an admitted request is the router's matter.
"""

from __future__ import annotations

from xllm.service.admission.admission import Admission, Ask

__all__ = ["Admission", "Ask"]
