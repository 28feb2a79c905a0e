"""Part 4 of the study: where the encoder puts a forgotten digit, and what is left where its pictures were."""

from dataclasses import asdict
from pathlib import Path

import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from sa_diffusers.core.seeding import derive_seed, seeded
from studies.mnist.latent.apart import Null, centroid_distances, class_means, distance_ratio, null_ratios, quarantine
from studies.mnist.latent.dead_zone import dead_zone, decode_plane
from studies.mnist.latent.figures import heat_maps, movement_arrows, scatter_pair
from studies.mnist.latent.quarantine import digit_silhouettes, quarantine_section, quarantine_text, silhouette_section
from studies.mnist.readings import DIGIT, NEARLY_GREY, Models, forget_one, forget_one_by_encoder
from studies.mnist.sections import figure, merge, merge_named, section, table
from studies.mnist.study import Study, encode_means


TSNE_IMAGES = 3000
STUDY_CENTROIDS = (
    "The study's figure reads: before, at most about .5 between any two; after, .9 to 1.15 from the 1 to the others "
    "and at most about .65 between others."
)


def compute(study: Study, folder: Path) -> dict:
    """Trains, on first use, the models that forgot by default and by the encoder, of many dimensions and of two."""
    models = forget_one_by_encoder(study)
    codes = _encode(study, models)
    sections = {
        "default": _default(study, forget_one(study)),
        "tsne": _tsne(study, codes, folder),
        "dead_zone": dead_zone(study, models, folder),
        "latent_2d": _two_dimensions(study, forget_one_by_encoder(study, latent_dim=2), folder),
        "centroids": _centroids(study, codes, folder),
    }
    return {"title": f"Latent space before and after forgetting the {DIGIT}"} | merge_named(sections)


def _encode(study: Study, models: Models) -> dict[str, Tensor]:
    """Encoder means of all test images under their own labels, [N, latent_dim], before and after."""
    data = study.test_images
    return {when: encode_means(model, data, range(len(data))) for when, model in models.items()}


def _default(study: Study, models: Models) -> dict:
    """What the default does to encoder and decoder; it draws latents from the prior, which spares the encoder."""
    codes = _encode(study, models)
    moved = float((codes["after"] - codes["before"]).abs().max())
    plane = decode_plane(models.after, DIGIT, list(study.classifiers.values())).numbers()
    text = (
        "The models below forgot by the paper's objective, whose latents come from the encoder, in "
        f"{study.config.encoder_steps:,} steps. By default the latents are drawn from the prior: then no mean code of "
        f"a test image moves by more than {moved:.3g} in any dimension, and of the plane of codes below, decoded as a "
        f"{DIGIT}, {plane['nearly_grey']:.1%} are within {NEARLY_GREY:g} of flat grey (mean deviation from it "
        f"{plane['deviation']:.3f})."
    )
    return section([text], [], [], {"moved": moved, "plane": plane})


def _tsne(study: Study, codes: dict[str, Tensor], folder: Path) -> dict:
    """t-SNE of a subset in each model; the quarantine in all dimensions and in the t-SNE plane."""
    data, seed = study.test_images, study.config.seed
    chosen = torch.randperm(len(data), generator=seeded(seed, "t-SNE subset"))[:TSNE_IMAGES]
    labels = data.labels[chosen]
    planes, full, flat = {}, {}, {}
    for when, points in codes.items():
        method = TSNE(random_state=derive_seed(seed, "t-SNE") % 2**32, n_jobs=study.config.num_threads)
        planes[when] = torch.from_numpy(method.fit_transform(points[chosen].numpy()))
        full[when] = quarantine(points[chosen], labels, DIGIT)
        flat[when] = quarantine(planes[when], labels, DIGIT)
    axis_names = ("t-SNE 1", "t-SNE 2")
    drawn = scatter_pair(list(planes.values()), labels, data.names, "t-SNE of encoder means", axis_names, shared=False)
    dimensions, images = codes["before"].shape[1], f"{len(chosen):,} test images"
    size = f"{dimensions}-D"
    null, _ = null_ratios(len(data.names), dimensions, seed)
    own = {when: digit_silhouettes(points[chosen], labels) for when, points in codes.items()}
    found = quarantine_section(
        f"{images}, {size} model",
        quarantine_text(full["before"], full["after"], f"{images} in the {size} model", null),
        {f"{size} codes, {when}": each for when, each in full.items()}
        | {f"their t-SNE, {when}": each for when, each in flat.items()},
        f"In the t-SNE plane the purity is {flat['before'].purity:.3f} before and {flat['after'].purity:.3f} "
        f"after, the spread {flat['before'].spread:.2f} and {flat['after'].spread:.2f}. The study shows the "
        "forgotten 1s in tight clumps.",
        figure(
            drawn,
            folder / "tsne.png",
            f"t-SNE of the encoder means of {images} under their own labels; places in the two plots cannot be "
            "compared, since each is fitted on its own.",
        ),
        {
            "images": len(chosen),
            "codes": {when: asdict(each) for when, each in full.items()},
            "plane": {when: asdict(each) for when, each in flat.items()},
            "null": asdict(null),
        },
    )
    return merge([found, silhouette_section(f"{images}, {size} model", own)])


def _two_dimensions(study: Study, models: Models, folder: Path) -> dict:
    """The model with two latent dimensions, whose codes need no projection to be seen."""
    data = study.test_images
    codes = _encode(study, models)
    found = {when: quarantine(points, data.labels, DIGIT) for when, points in codes.items()}
    places = {when: class_means(points, data.labels)[DIGIT].tolist() for when, points in codes.items()}
    share = float((data.labels == DIGIT).double().mean())
    place, place_after = (f"({x:.2f}, {y:.2f})" for x, y in places.values())
    images = f"all {len(data):,} test images"
    null, _ = null_ratios(len(data.names), 2, study.config.seed)
    own = {when: digit_silhouettes(points, data.labels) for when, points in codes.items()}
    axis_names = ("latent dimension 0", "latent dimension 1")
    drawn = scatter_pair(list(codes.values()), data.labels, data.names, "Encoder means", axis_names, shared=True)
    caption = f"Encoder means of {images} under their own labels in the model with two latent dimensions."
    one = quarantine_section(
        f"{images}, 2-D model",
        quarantine_text(found["before"], found["after"], f"{images} in the 2-D model", null),
        found,
        f"By chance the purity would be {share:.3f}. The centroid of the {DIGIT}s is at {place} before and "
        f"{place_after} after. The study shows the 1s leave the middle for a crescent at about -2 to -3 of one "
        "dimension: their quarantine.",
        figure(drawn, folder / "latent_2d.png", caption),
        {when: asdict(each) | {"centroid": places[when]} for when, each in found.items()} | {"null": asdict(null)},
    )
    return merge([one, silhouette_section(f"{images}, 2-D model", own)])


def _centroids(study: Study, codes: dict[str, Tensor], folder: Path) -> dict:
    """Distances between the digits' mean codes, and how these moved."""
    labels, names = study.test_images.labels, study.test_images.names
    distances = {when: centroid_distances(points, labels) for when, points in codes.items()}
    means = [class_means(points.double(), labels) for points in codes.values()]
    pca = PCA(2).fit(torch.cat(means).numpy())
    explained = pca.explained_variance_ratio_.tolist()
    planes = [torch.from_numpy(pca.transform(each.numpy())) for each in means]
    moved = (means[1] - means[0]).norm(dim=1)
    found = {when: _summary(each) for when, each in distances.items()}
    _, null = null_ratios(len(names), codes["before"].shape[1], study.config.seed)
    numbers = {when: found[when] | {"distances": each.tolist()} for when, each in distances.items()}
    columns = [
        "model", f"mean d({DIGIT}, others) / mean d(others)", f"least d({DIGIT}, other)", f"largest d({DIGIT}, other)",
        "largest d between others", "largest d",
    ]  # fmt: skip
    rows = [[when, *each.values()] for when, each in found.items()]
    between = "Euclidean distances between the digits' mean encoder means, over all test images."
    moves = "How the digits' mean codes move, in the plane of a PCA fitted on both models' at once."
    figures = [
        figure(heat_maps(list(distances.values()), names), folder / "centroid_distances.png", between),
        figure(movement_arrows(planes, names, explained), folder / "centroid_arrows.png", moves),
    ]
    return section(
        _centroid_text(found, moved, null),
        [table("Euclidean distances d between the digits' mean codes", columns, rows)],
        figures,
        numbers | {"moved": moved.tolist(), "explained_variance": explained, "null": asdict(null)},
    )


def _summary(distances: Tensor) -> dict[str, float]:
    """The numbers of a table of distances that the study's figure can be compared with."""
    others = torch.arange(len(distances)) != DIGIT
    row = distances[DIGIT, others]
    return {
        "ratio": float(distance_ratio(distances, DIGIT)),
        "least_of_digit": float(row.min()),
        "largest_of_digit": float(row.max()),
        "largest_of_others": float(distances[others][:, others].max()),
        "largest": float(distances.max()),
    }


def _centroid_text(found: dict[str, dict[str, float]], moved: Tensor, null: Null) -> list[str]:
    before, after = found["before"], found["after"]
    others = moved[torch.arange(len(moved)) != DIGIT]
    return [
        f"The mean distance from the centroid of the {DIGIT}s to the others' is {before['ratio']:.2f} times that "
        f"between two others' before forgetting and {after['ratio']:.2f} times after; 1 is no farther than others are "
        f"from each other, and centroids at random give {null} (it is {null.place(before['ratio'])} that "
        f"range before and {null.place(after['ratio'])} after). Before, no two centroids are "
        f"more than {before['largest']:.2f} apart; after, that of the {DIGIT}s is {after['least_of_digit']:.2f} to "
        f"{after['largest_of_digit']:.2f} from the others and no two others are more than "
        f"{after['largest_of_others']:.2f} apart. {STUDY_CENTROIDS}",
        f"The centroid of the {DIGIT}s moves by {float(moved[DIGIT]):.2f}, those of the other digits by "
        f"{float(others.min()):.2f} to {float(others.max()):.2f}.",
    ]
