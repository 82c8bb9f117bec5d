"""`python -m mooli` and the `mooli` command, which are the same."""

from mooli.entry import run


def main() -> int:
    """Run the command line and return the exit status."""
    from mooli.cli import main as run_command_line

    return run_command_line()


def command() -> None:
    """The `mooli` command: ends the process."""
    run(main)


if __name__ == "__main__":
    command()
