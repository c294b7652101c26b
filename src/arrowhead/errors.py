"""The errors that arrowhead raises and the warnings that it gives.

Each message says what was got, what was wanted, and what to do about it.
"""


class ArrowheadError(Exception):
    """Base of all errors that arrowhead raises on purpose. Catch it to handle every one of them."""


class PlanInvalid(ArrowheadError, ValueError):
    """A plan, or a plan file, contradicts itself or cannot run.

    Raised when a `Plan` is made, saved or loaded. Correct the cell that the message names, or search again.
    """


class PlanMismatch(ArrowheadError, ValueError):
    """A sound plan meets a pipeline, or a call of it, that the plan was not made for.

    Raised by `apply`, and when a generation begins. The message names what differs. Search again on this pipeline with
    these arguments; for other steps or tokens, `Plan.resample` may be enough.
    """


class UnsupportedPipeline(ArrowheadError, TypeError):
    """arrowhead cannot put plans on a pipeline or model: it finds no attention sites there, or something on it is in the way.

    Raised by `apply`, `search`, `calibrate` and `analyze`. `supported()` lists what works; a model of other code needs an
    `Adapter`.
    """


class InputsInvalid(ArrowheadError, ValueError):
    """Arguments that the pipeline's call, or arrowhead itself, cannot take. Change the argument that the message names."""


class AlreadyApplied(ArrowheadError, RuntimeError):
    """A pipeline has a plan already. Take the plan off with `remove`, then try again."""


class AlreadyGenerating(ArrowheadError, RuntimeError):
    """A generation or a search is running on the pipeline, and another call would become part of it.

    Wait until it has ended, or use another pipeline.
    """


class NotIntercepted(ArrowheadError, RuntimeError):
    """A module, scheduler or loop did not call what arrowhead intercepts, or gave something else than arrowhead expects.

    The plan would have done nothing, or something wrong. Raised by `apply`, in generations, and in searches. The message names
    the site, and what to look at.
    """


class KernelUnavailable(ArrowheadError, RuntimeError):
    """The kernel that was asked for by name cannot run here: no kernel has this name, or the call is none that it can compute.

    Another kernel never takes over silently. Choose one that the message names, or ``kernel="auto"``.
    """


class FileUnwritable(ArrowheadError, OSError):
    """A file or folder cannot be written: the path is wrong, may not be written, or the disk is full.

    A file that was there before is unchanged. Free some space, or take another path. `errno` is that of the system's error.
    """


class HubUnavailable(ArrowheadError, OSError):
    """A plan or a profile cannot be read from the Hugging Face Hub, or pushed there.

    There is no such repository, revision or file, it may not be read or written, or there is no connection. The message has
    what the Hub said. Check the name, and the token (`hf auth login`).
    """


class ArrowheadWarning(UserWarning):
    """Base of all warnings that arrowhead gives. Filter by it to silence every one of them."""


class NothingCompressed(ArrowheadWarning):
    """A search with a positive threshold found nothing to compress. Search with a larger threshold."""


class NothingLearnt(ArrowheadWarning):
    """Nothing could be learnt from a generation that `speedup` watched: it ran without a plan."""


class ProfileNotKept(ArrowheadWarning):
    """What `speedup` learnt could not be written to the folder for caches, and is not there for other processes.

    The pipeline becomes faster all the same. Set `ARROWHEAD_CACHE` to a folder that can be written, or pass `cache=False`.
    """


class CalibrationFitted(ArrowheadWarning):
    """A calibration would not have fitted the free memory, and began again with settings by which it holds less.

    Given where no `Extent` was asked for. Give one to choose these settings.
    """


class ShareCfgIgnored(ArrowheadWarning):
    """The plan shares attention between the CFG branches, but a generation has one branch, and nothing to share.

    Given when a generation begins without guidance. Search again without guidance for a plan that fits it.
    """


class GuidanceNotPlanned(ArrowheadWarning):
    """The plan was made without guidance, but a generation has guidance.

    Given when a generation begins. Guidance multiplies the errors of the plan. Search again with guidance for a plan that fits.
    """


class GuidanceMissing(ArrowheadWarning):
    """The plan was made with guidance, but a generation has none.

    Given when a generation begins, unless `ShareCfgIgnored` is. Search again without guidance for a plan that fits it.
    """


class PlanDerived(ArrowheadWarning):
    """The plan was derived by `Plan.resample`, for other steps or tokens than it was found for.

    Given when the plan is applied. Search again with these steps and tokens for the best quality.
    """


class PlanAdapted(ArrowheadWarning):
    """A generation runs under other circumstances than the plan was made for, and the plan was carried over to them.

    Given in a generation, once for each new circumstance: other noise levels (steps, strength, schedule), other sizes, another
    scheduler, guidance that ends or begins on the way. Search again there for a plan that fits, or refuse such generations by
    `apply(..., changes="refuse")`.
    """


class OtherWeights(ArrowheadWarning):
    """The plan was found with other weights of the same shapes, such as those of a fine-tuned model or of a fused LoRA.

    Given when the plan is applied. The plan runs; its error may be another. Search again with these weights.
    """


class BandCoversAll(ArrowheadWarning):
    """A band reaches over the whole sequence: it computes full attention. Use smaller radii to save work."""


class SiteNotReached(ArrowheadWarning):
    """In a generation a site whose processor was replaced ran without arrowhead, or the pipeline never called its transformer.

    Given when a generation ends. Apply the plan after whatever else replaces processors. A site that something else skips is
    an error, `NotIntercepted`.
    """


class GenerationUnfinished(ArrowheadWarning):
    """A generation ended before the plan's last step, or a custom model's loop began again.

    The next generation begins with the plan's first step. Let a generation run to its end.
    """


class ProcessorReplaced(ArrowheadWarning):
    """An attention processor, or a forward, was replaced while a plan was applied, so that its site is no longer compressed.

    `remove` leaves the new one in place. Apply the plan after whatever replaces processors.
    """


class CardKept(ArrowheadWarning):
    """A repository or a folder has a README.md that arrowhead did not write: a plan or a profile is there without a card."""


class InputsRepeated(ArrowheadWarning):
    """There are fewer prompts or labels than images, so that some are used more often than others. Give more of them."""


class TooFewSamples(ArrowheadWarning):
    """There are too few images for a metric to mean anything. Generate more."""
