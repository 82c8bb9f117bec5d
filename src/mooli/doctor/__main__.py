"""`python -m mooli.doctor`: the same as `mooli doctor`, also where a package that other commands need is broken."""

from mooli.entry import run


def main() -> int:
    """Print the report and return the exit status."""
    from mooli.arguments import CommandParser
    from mooli.doctor.command import add_doctor_args, run_doctor

    parser = CommandParser(prog="mooli doctor", description="Say what this machine has and what is missing.")
    add_doctor_args(parser)
    return run_doctor(parser.parse_args())


if __name__ == "__main__":
    run(main)
