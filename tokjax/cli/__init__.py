"""The `tokjax` command: one file per sub-command, each with `main(argv)`."""

__all__: list[str] = []
