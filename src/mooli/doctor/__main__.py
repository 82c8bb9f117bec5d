"""`python -m mooli.doctor`: the same as `mooli doctor`, also where a package that other commands need is broken."""

from mooli.entry import run


def main() -> int:
    """Print the report and return the exit status."""
    from mooli.arguments import CommandParser
    from mooli.doctor.command import add_doctor_args, run_doctor
    from mooli.errors import ConfigError
    from mooli.logs import report_error

    parser = CommandParser(prog="mooli doctor", description="Say what this machine has and what is missing.")
    add_doctor_args(parser)
    try:
        return run_doctor(parser.parse_args())
    except ConfigError as exc:
        report_error(exc)
        return 2


if __name__ == "__main__":
    run(main)
