"""Silence log messages and warnings of DeepSpeed and torch."""

from __future__ import annotations

import logging
import warnings


def quiet_deepspeed() -> None:
    """Limit DeepSpeed's log to errors, and silence warnings about its use of deprecated torch.distributed names."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
