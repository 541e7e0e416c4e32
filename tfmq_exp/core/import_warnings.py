"""Warnings of other packages about themselves, printed at every import of diffusers wherever torchao is installed."""

import logging

# logger -> beginning of the message that says nothing about this program
KNOWN = {
    # torchao registers its enums by a function that torch has deprecated
    "torch.utils._pytree": "%s is an Enum subclass",
    # diffusers looks for classes that this torchao has moved; no checkpoint here is one of torchao's
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}


def silence_import_warnings() -> None:
    """Drop exactly these messages; others of the same loggers are shown."""
    for name, beginning in KNOWN.items():
        logging.getLogger(name).addFilter(lambda record, known=beginning: not str(record.msg).startswith(known))
