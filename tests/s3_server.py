"""moto's S3 server with one request at a time: its own threads can both pass the check of a conditional write.

python tests/s3_server.py PORT
"""

import sys
import threading

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.server import MotoRequestHandler
from werkzeug.serving import run_simple

_ONE_AT_A_TIME = threading.Lock()


class OneAtATime:
    """What a real store promises: no two requests see the same state and change it."""

    def __init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ, start_response):
        with _ONE_AT_A_TIME:
            return self._application(environ, start_response)


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), OneAtATime(), threaded=True, request_handler=MotoRequestHandler)
