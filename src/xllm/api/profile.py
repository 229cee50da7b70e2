"""POST /start_profile and /stop_profile: vLLM's names for recording what a front and its engines do.

For administrators. The reply names the file that was written, on the front's machine.
"""

from __future__ import annotations

import msgspec

from xllm.api.context import Context
from xllm.api.http import Reply, Request
from xllm.service.profiler import Profiler


class ProfileRoutes:
    def __init__(self, context: Context, profiler: Profiler) -> None:
        self._context = context
        self._profiler = profiler

    async def start(self, _: Request, reply: Reply) -> None:
        await reply.send(200, msgspec.json.encode(self._profiler.start(self._context.front)))

    async def stop(self, _: Request, reply: Reply) -> None:
        await reply.send(200, msgspec.json.encode(await self._profiler.stop(self._context.front)))
