"""``python -m teacher_student_mask`` is ``tsmask``."""

from .cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
