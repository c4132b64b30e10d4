"""What can go wrong between a line of configuration and finished features."""


class TeacherError(ValueError):
    """A teacher cannot be built as it is configured."""


class UnknownTeacherError(TeacherError):
    """No library knows a model, or a set of weights, of this name."""


class MissingWeightsError(TeacherError):
    """The weights are neither on this machine nor could they be downloaded."""


class WrongCheckpointError(TeacherError):
    """A weights file cannot be read, or does not belong to this model."""


class ExtractionError(ValueError):
    """Features cannot be computed from these images with this teacher."""


class ImageChangedError(ExtractionError):
    """An image is no longer the file that was indexed."""


class NonFiniteFeaturesError(ExtractionError):
    """A teacher answered with values that are not finite, or too large for the store."""


class BatchTooLargeError(ExtractionError):
    """Not even one image at a time fits into memory."""


class WorkersLostError(ExtractionError):
    """Workers died over the same unit again and again, or the scheduler is gone."""
