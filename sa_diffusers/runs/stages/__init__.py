"""The stages of a run, a file each; `stages_of` lists those that a method needs."""

from sa_diffusers.io.stages import Stage
from sa_diffusers.runs.adapters.merge import ChainEndStage, MergeStage
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.stages.carried import CarriedFisherStage
from sa_diffusers.runs.stages.edit import EditStage
from sa_diffusers.runs.stages.evaluate import EvaluateStage, RetrainedStage
from sa_diffusers.runs.stages.fisher import FisherStage
from sa_diffusers.runs.stages.replay import ReplayStage
from sa_diffusers.runs.stages.samples import PicturesStage, SamplesStage
from sa_diffusers.runs.stages.strengths import ChoiceStage, StrengthStage
from sa_diffusers.runs.stages.surrogate import SurrogateStage
from sa_diffusers.runs.stages.train import TRAINED, TrainStage
from sa_diffusers.training.strengths import offered


ATTACKED = 0.25  # pictures of the concept for an adversary, as a share of those of the surrogate


def stages_of(context: RunContext) -> list[Stage]:
    """The stages that the method needs, in their order, and those that these take."""
    if context.merge:
        before = ChainEndStage if context.merge.taken_back else EvaluateStage
        return [before("before", ("model", "exam")), MergeStage(), EvaluateStage("after", (MergeStage.name, "exam"))]
    samples = PicturesStage() if context.method.completes else SamplesStage()
    attacked = SurrogateStage("concept_samples", ATTACKED)
    carried = context.chain and context.options.chain_fisher == "carried"
    fisher = CarriedFisherStage() if carried else FisherStage()
    making = (EditStage(), samples, ReplayStage(), SurrogateStage(), attacked, fisher)
    needs = set(context.needs)
    if context.options.adapters == "each":  # each starts at its own edit, which it makes itself
        needs.discard(EditStage.name)
    for stage in reversed(making):
        estimated = stage.name in needs and not (stage.name == FisherStage.name and context.options.fisher)
        needs.update(stage.inputs if estimated else ())
    judging = (
        EvaluateStage("before", ("model", "exam", "pictures", ReplayStage.name)),
        EvaluateStage("after", ("train", "exam", "pictures")),
    )
    retrained = [RetrainedStage()] if "retrained_model" in context.artifacts else []
    strengths = [one for one in offered(context.options) if context.options.strength_sheet or one == context.strength]
    others = [StrengthStage(one) for one in strengths if not one.trained]
    # Where another was chosen before, what training ended with must also be chosen.
    choice = [ChoiceStage()] if not context.strength.trained or (context.folder / TRAINED).exists() else []
    made = (stage for stage in making if stage.name in needs)
    return [*made, judging[0], *retrained, TrainStage(context.folder), judging[1], *others, *choice]
