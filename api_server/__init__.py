"""NeuroScope's REST server.

from api_server import ModelWorker, Server, ServerConfig, create_app

config = ServerConfig(port=0)
with ModelWorker() as worker:
    worker.load("neuroscope-tiny")
    Server(create_app(worker, config), config).run()

In a Flask application of one's own, what was captured during training is analysed by a blueprint:

app.register_blueprint(interpretability_blueprint(model, MechIntConfig(storage_path="mechint_cache")))
"""

from .app import create_app
from .blueprint import interpretability_blueprint
from .config import ServerConfig
from .server import Server
from .worker import ModelWorker

__all__ = ["ModelWorker", "Server", "ServerConfig", "create_app", "interpretability_blueprint"]
