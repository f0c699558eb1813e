"""Say whether a run would work here: `python -m steps.doctor [cfg=quickstart]`."""

import sys

from pipeline.compose import cli
from pipeline.errors import UserError
from pipeline.runs.step import configuration


def main(argv: list[str]) -> int:
    """Exit code 0 if a run would work, 1 if it would fail, 2 for a configuration that is itself wrong."""
    try:
        command = cli.parse(argv)
        if command.help:
            print(cli.help_text("doctor", command.cfg))
            return 0
        config = configuration(command)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    from pipeline.doctor import report

    return report(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
