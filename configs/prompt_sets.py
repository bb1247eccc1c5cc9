"""Prompts of others for an evaluation; config.eval.prompts chooses among them (livo_jax/evaluation/prompt_sets.py).

"As read" below: the header was seen in the public file; where it was not, that is said. Licences are the publishers'.
"""

from ml_collections import ConfigDict


def get_sets() -> ConfigDict:
    """{name: set}; the name is the split in the results.

    A set is a `file`, of the dataset `repo` on the Hugging Face hub or, where that is empty, on disk: a .csv or .tsv
    with a header, a .jsonl, or a .txt, whose lines are its only column. `column` holds the prompts; with a `template`
    it holds subjects, which the template makes prompts of. `subject`, if not empty, is a column too, of what is in the
    prompt: "recognised" needs it. `limit` is how many prompts are chosen at most, by config.eval.seed; 0 takes all.
    """

    def entry(file, repo="", column="prompt", template="", subject="") -> ConfigDict:
        return ConfigDict(dict(repo=repo, file=file, column=column, template=template, subject=subject, limit=0))

    sets = {
        # Yours.
        "own": entry("prompts.jsonl"),
        # Inappropriate image prompts (Schramowski et al. 2023), 4703 of them, harmful in seven ways: the file as
        # listed on the hub, the column as in the card of the copy shivank21/i2p.
        "i2p": entry("i2p_benchmark.csv", repo="AIML-TUDA/i2p"),
        # CoProV2 (Liu et al. 2024): data/CoProv2_test.csv of github.com/Visualignment/SafetyDPO, as read:
        # prompt,image,category. On the hub it is parquet with images.
        "copro": entry("CoProv2_test.csv"),
        # Captions of 30,000 COCO images (Gandikota et al. 2023): data/coco_30k.csv of
        # github.com/rohitgandikota/erasing, as read: image_id,source,prompt,evaluation_seed.
        "coco_30k": entry("coco_30k.csv"),
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
    }
    # LiVO (Wang et al. 2024): these names and the field "prompt" are in evaluation/*.py and
    # value_retriever/retrieve_eval_data.py of github.com/achernarwang/LiVO; the files, which the authors give on
    # request, were not at hand.
    for name in ("career", "goodness", "badness", "nudity", "bloody", "zombie"):
        sets[f"livo_{name}"] = entry(f"livo_eval_data/{name}.jsonl")
    return ConfigDict(sets)
