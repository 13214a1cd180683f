"""The HTTP door: the listener, its TLS and its life."""

import logging

from rudder.server.config import ConfigError
from rudder.server.http.app import App
from rudder.server.http.listener import Listener, server_context
from rudder.server.monitoring.logs import fields
from rudder.server.service.serving import Serving

logger = logging.getLogger(__name__)
# Beyond what queue and engine hold: Rudder refuses calls itself, as its refusals give reasons.
SPARE_CONNECTIONS = 1024


class HttpDoor:
    """Serves the OpenAI API over HTTP/1.1. Until `set_serving`, `/health` says that it does not."""

    name = "http"

    def __init__(self, serving: Serving) -> None:
        config = serving.config
        self.listen = config.listen
        self.context = server_context(config.tls, serving.metrics.reload_failed)
        self.app = App(serving)
        self.listener = Listener(self.app, config.limits.queue + config.engine.max_num_seqs + SPARE_CONNECTIONS)

    async def start(self) -> str:
        """Listen, and return the URL that clients take as their base. Raises ConfigError if the port is taken."""
        address = self.listen.address(self.listen.http_port or 0)
        try:
            port = await self.listener.start(self.listen.host, self.listen.http_port or 0, self.context)
        except OSError as error:
            raise ConfigError("listen.http_port", f"cannot listen on {address}: {error.strerror}") from error
        base = f"{'https' if self.context else 'http'}://{self.listen.address(port)}"
        logger.info("the console listens", extra=fields(url=f"{base}/console/"))
        return f"{base}/v1"

    async def set_serving(self, serving: bool) -> None:
        """Set what `/health` says."""
        self.app.healthy = serving

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and abort those that still run after `grace_s`."""
        await self.listener.stop(grace_s)
