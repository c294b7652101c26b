"""What arrowhead raises and warns of. Every message says what was got, what was wanted, and what to do about it."""


class ArrowheadError(Exception):
    """Base of every error that arrowhead raises on purpose."""


class PlanInvalid(ArrowheadError, ValueError):
    """A plan, or the file that holds one, contradicts itself."""


class PlanMismatch(ArrowheadError, ValueError):
    """A sound plan was put on a pipeline, or met a call, that it was not made for."""


class UnsupportedPipeline(ArrowheadError, TypeError):
    """The pipeline has no attention sites that arrowhead knows."""


class InputsInvalid(ArrowheadError, ValueError):
    """Arguments that the pipeline's call, or arrowhead itself, cannot take."""


class AlreadyApplied(ArrowheadError, RuntimeError):
    """The pipeline carries a plan already."""


class AlreadyGenerating(ArrowheadError, RuntimeError):
    """A generation, or a search, is going on: another call would take part in it."""


class NotIntercepted(ArrowheadError, RuntimeError):
    """An attention module ran, but arrowhead was never asked: nothing would have been compressed."""


class KernelUnavailable(ArrowheadError, RuntimeError):
    """The kernel that was asked for cannot run here. An explicit choice never falls back."""


class ArrowheadWarning(UserWarning):
    """Base of every warning that arrowhead gives."""


class NothingCompressed(ArrowheadWarning):
    """A search with a positive threshold found nothing to compress."""


class ShareCfgIgnored(ArrowheadWarning):
    """The plan shares attention between the CFG branches, but this generation has only one branch."""


class PlanDerived(ArrowheadWarning):
    """The plan was not found for these steps, or these tokens, but derived from one for others."""


class BandCoversAll(ArrowheadWarning):
    """A band is as wide as the sequence: it is computed, and is the same as full attention."""


class SiteNotReached(ArrowheadWarning):
    """A site that the plan speaks of was passed over in a generation, or ran without arrowhead."""


class GenerationUnfinished(ArrowheadWarning):
    """A generation ended before the plan's last step, or a loop of one's own began anew."""


class ProcessorReplaced(ArrowheadWarning):
    """Somebody replaced an attention processor while a plan was applied."""


class InputsRepeated(ArrowheadWarning):
    """There are fewer prompts or labels than images, and some are drawn more often than others."""


class TooFewSamples(ArrowheadWarning):
    """There are too few images for a figure to mean what it says."""
