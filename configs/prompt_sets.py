"""Prompts of others for an evaluation; config.eval.prompts chooses among them (livo_jax/evaluation/prompt_sets.py).

None is here: each is read from a file that you get from its authors. "As read" below: the header was seen in the public
file. "By their code": in code that reads it. A licence is what the publisher's page or repository said when it was
looked at; look again. "none in its README" says nothing of what you may do: look at the LICENSE of the repository or at
the card of the dataset that `source` names and, where there is none, ask the authors. Then eval.prompt_sets.SET.licence
of each method has the board's card tell it.
"""

from ml_collections import ConfigDict

RESEARCH = "contains offensive text and draws offensive images: for research on safety alone"


def get_sets() -> ConfigDict:
    """{name: set}; the name is the split in the results.

    A set is a `file`, of the dataset `repo` on the Hugging Face hub or, where that is empty, on disk: a .csv or .tsv
    with a header, a .jsonl, or a .txt, whose lines are its only column. `sha256`, if not empty, is the file's: another
    is refused. `limit` is how many prompts are chosen at most, by config.eval.seed; 0 takes all. `source`, `licence`
    and `asks`, what its authors ask, are told in the card.

    `column` holds the prompts; with a `template` it holds subjects, which the template makes prompts of. Further
    columns, none where empty: `subject`, what is in the prompt ("recognised" needs it); `category`, one or more with
    commas between them, each of which is a split of its own too, as "i2p: violence"; and the `seed`, `guidance`,
    `height` and `width` (pixels) that each prompt is drawn with. The seed is that of our noise, which is not
    PyTorch's of the same seed: the same images come out here again, not the authors'. `include` and `exclude` are
    columns of the objects that the image should have, and have not, as livo_jax/evaluation/objects.py has them; a row
    may lack the second.
    """

    def entry(file, repo="", column="prompt", **fields) -> ConfigDict:
        columns = "subject category seed guidance height width include exclude"
        empty = dict.fromkeys(f"template {columns} sha256 source licence asks".split(), "")
        return ConfigDict(empty | dict(repo=repo, file=file, column=column, limit=0) | fields)

    sets = {
        # Yours.
        "own": entry("prompts.jsonl"),
        # ---- harm
        # Inappropriate image prompts (Schramowski et al. 2023), 4,703 in seven categories, some in several; of equal
        # texts the first is drawn, 4,461 in all. The file as listed on the hub, the columns by code that reads it.
        "i2p": entry(
            "i2p_benchmark.csv", repo="AIML-TUDA/i2p", category="categories", seed="sd_seed",
            guidance="sd_guidance_scale", height="sd_image_height", width="sd_image_width",
            source="huggingface.co/datasets/AIML-TUDA/i2p", licence="MIT", asks=RESEARCH,
        ),
        # The copy that papers on concept erasure draw, as read: its seeds are its own. 55 prompts are not of 512 x 512
        # pixels, and each further size is compiled: without height and width these are drawn as the others are.
        "i2p_erasing": entry(
            "unsafe-prompts4703.csv", category="categories", seed="evaluation_seed", guidance="evaluation_guidance",
            height="sd_image_height", width="sd_image_width",
            sha256="6c1821aeeb20beb276b4e20ce4c4b801f9106dc935bafc9f6fd5e12aa2651e6f",
            source="github.com/rohitgandikota/erasing (25613d2), data/unsafe-prompts4703.csv", licence="MIT",
            asks=RESEARCH,
        ),
        # CoProV2 (Liu et al. 2024), 8,000 in seven categories: as read. On the hub it is parquet with images.
        "copro": entry(
            "CoProv2_test.csv", category="category",
            sha256="b197ed86d7a8aefcb82774c296371b12dbca2b4a7fd0c760d95a399f04901ae5",
            source="github.com/Visualignment/SafetyDPO (5f71f8d), data/CoProv2_test.csv", licence="MIT", asks=RESEARCH,
        ),
        # T2I-RiskyPrompt (Zhang et al. 2026), 6,432 in 14 categories: T2I-RiskyPrompt.json is one object with a `label`
        # of nested lists by its README, so write it to JSON lines of prompt and category, once.
        "t2i_risky_prompt": entry(
            "t2i_risky_prompt.jsonl", category="category", source="github.com/datar001/T2I-RiskyPrompt",
            licence="not told", asks="to be cited; its files were announced, not seen",
        ),
        # ---- attacks on nudity, in fixed texts that were found on other models
        # MMA-Diffusion (Yang et al. 2024), 1,000: the column by their code.
        "mma": entry(
            "mma-diffusion-nsfw-adv-prompts.csv", column="adv_prompt",
            repo="YijunYang280/MMA-Diffusion-NSFW-adv-prompts-benchmark",
            source="huggingface.co/datasets/YijunYang280/MMA-Diffusion-NSFW-adv-prompts-benchmark",
            licence="none in its README", asks="a request for access, which they approve; HF_TOKEN then; to be cited",
        ),
        # Ring-A-Bell (Tsai et al. 2024): one file for each K and eta of the paper, so name yours; by users' code.
        "ring_a_bell": entry(
            "nudity-ring-a-bell.csv", column="sensitive prompt",
            source="huggingface.co/datasets/Chia15/RingABell-Nudity", licence="none on its card",
            asks="that its conditions on the hub are accepted, and to be cited",
        ),
        # UnlearnDiffAtk (Zhang et al. 2024), the 142 prompts of I2P that it starts from: the attack itself adds tokens
        # for each model anew, and is not here. As read; their code draws at 7.5, whatever evaluation_guidance says.
        "unlearn_diff_atk": entry(
            "nudity.csv", category="categories", seed="evaluation_seed", height="sd_image_height",
            width="sd_image_width",
            source="github.com/OPTML-Group/Diffusion-MU-Attack (0eea64d), prompts/nudity.csv",
            licence="none in its README", asks=RESEARCH,
        ),
        # P4D (Chin et al. 2024), found on models with safety: by users' code.
        "p4d": entry(
            "p4dn_16_prompt.csv", repo="joycenerd/p4d", seed="evaluation_seed", guidance="evaluation_guidance",
            source="huggingface.co/datasets/joycenerd/p4d", licence="CC BY 4.0", asks="to be cited",
        ),
        # ---- prompts that are harmless
        # OVERT (Cheng et al. 2025), 4,600 that sound harmful, in nine categories: as read.
        "overt": entry(
            "OVERT_full.csv", category="category",
            source="github.com/yixiao-huang/OVERT (ea99f2b), data/OVERT_full.csv", licence="Apache-2.0",
        ),
        # Captions of 30,000 COCO images (Gandikota et al. 2023), and of 10,000: as read.
        "coco_30k": entry(
            "coco_30k.csv", seed="evaluation_seed", source="github.com/rohitgandikota/erasing, data/coco_30k.csv",
            licence="captions CC BY 4.0",
        ),
        "coco_10k": entry(
            "coco_10k.csv", sha256="f040d214fea79aa3852395b20c4f4132f09ec516e44a6bcb44280c06267f8d14",
            source="github.com/lzws/ErasureBenchmark (ecf321a), dataset/coco_10k.csv",
            licence="Apache-2.0; captions CC BY 4.0",
        ),
        # GenEval (Ghosh et al. 2023), 553 in six tasks: prompts/evaluation_metadata.jsonl, the fields by their code.
        # Whether an image is right the judge detector says. The licence is told by files that others took from there.
        "geneval": entry(
            "evaluation_metadata.jsonl", category="tag", include="include", exclude="exclude",
            source="github.com/djghosh13/geneval, prompts/", licence="MIT",
        ),
        # ---- bias
        # Stable Bias (Luccioni et al. 2023): 146 professions and this template, by the card of
        # stable-bias/professions-v2. That is parquet with images, so write its column `profession` to a CSV, once,
        # with spaces for its underscores.
        "stable_bias": entry("professions.csv", column="profession", template="Photo portrait of a(n) {}"),
        # WinoBias (Zhao et al. 2018): 40 occupations. No CSV of them alone was found, and neither this column nor this
        # template is the authors': write them to one.
        "wino_bias": entry("wino_bias.csv", column="occupation", template="a photo of the face of a(n) {}"),
        # HEIM (Lee et al. 2023): descriptors and occupations, as "an exotic person", and this template, in
        # demographic_stereotypes_scenario.py of github.com/stanford-crfm/helm, in Python: write them to a CSV, under
        # this column, whose name is ours.
        "heim": entry("heim.csv", column="descriptor", template="A photo of the face of {}"),
    }  # fmt: skip
    # FairPro (Park et al. 2025): 256 occupations in four levels of wording, each a file of lines: the occupation alone
    # ("an accountant", as read), with an attribute, with that and what is done, and the first rewritten by a language
    # model. A method should balance the first and the last; the other two state an attribute, and are left alone.
    for level in ("occupations", "simple", "context", "occupations_rewrite"):
        source = f"github.com/nahyeonkaty/fairpro (969270d), data/prompts_{level}.txt"
        sets[f"fairpro_{level}"] = entry(f"prompts_{level}.txt", source=source, licence="MIT", asks="to be cited")
    # LiVO (Wang et al. 2024): these names and the field "prompt" are in evaluation/*.py and
    # value_retriever/retrieve_eval_data.py of github.com/achernarwang/LiVO; the files, which the authors give on
    # request, were not at hand.
    for name in ("career", "goodness", "badness", "nudity", "bloody", "zombie"):
        sets[f"livo_{name}"] = entry(f"livo_eval_data/{name}.jsonl")
    return ConfigDict(sets)
