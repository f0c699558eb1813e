"""Serve a student without running its version's code: `python -m steps.serve model=models:/<name>@champion port=5001`.

Answers as `mlflow models serve` does for a student; makes no run. Ends with SIGTERM or Ctrl-C.
"""

import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.compose import cli
from pipeline.compose.groups import STUDENTS
from pipeline.config.numbers import whole
from pipeline.errors import UserError
from pipeline.runs.step import configuration, outside

OWN = {
    "model": STUDENTS,
    "host": "the address to listen on, 127.0.0.1 by default; others behind a proxy with passwords and TLS (deploy/)",
    "port": "5001 by default; 0 takes a free one",
    "timeout": "seconds that a request may take, 60 by default",
    "max_bytes": "of a request, 33554432 by default",
}
MOST = 1 << 31
logger = logging.getLogger("asib")


def main(argv: Sequence[str]) -> int:
    """The keys of `OWN` are the step's own."""
    try:
        own, rest = cli.take(argv, OWN)
    except UserError as error:
        logger.error("%s", error)
        return 2
    if "--help" in rest:
        print("\n".join(f"  {key}: {words}" for key, words in OWN.items()))
        return 0
    return outside("serve", rest, lambda command: _serve(own, command))


def _serve(own: Mapping[str, str], command: cli.Command) -> int:
    from pipeline.predict import serve
    from pipeline.tracking import start

    source = own.get("model", "")
    if not source:
        raise UserError(f"model is not set: give model={STUDENTS}")
    port = whole("port", own.get("port") or "5001", 0, 65535)
    timeout = whole("timeout", own.get("timeout") or "60", high=MOST)
    most = whole("max_bytes", own.get("max_bytes") or str(32 << 20), high=MOST)
    where = configuration(command, OWN).tracking
    limits = serve.Limits(body=most, request=timeout)
    socket = serve.listen(own.get("host") or "127.0.0.1", port)
    uri = where.uri or start.default_uri()
    with socket:
        with tempfile.TemporaryDirectory(prefix="asib-served-") as folder:
            classifier, version = serve.load(source, lambda what, to: start.fetch_now(uri, what, to), Path(folder))
        host, port = socket.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        logger.info("serving %s on http://%s:%d", version, address, port)
        try:
            serve.server(serve.application(classifier, limits), limits).run(sockets=[socket])
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
