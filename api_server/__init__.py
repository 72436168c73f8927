"""NeuroScope's REST server.

from api_server import ModelWorker, Server, ServerConfig, create_app

config = ServerConfig(port=0)
with ModelWorker() as worker:
    worker.load("neuroscope-tiny")
    Server(create_app(worker, config), config).run()
"""

from .app import create_app
from .config import ServerConfig
from .server import Server
from .worker import ModelWorker

__all__ = ["ModelWorker", "Server", "ServerConfig", "create_app"]
