"""The engine behind imagenet_swin.py and imagenet_resnet.py: a recipe in, a trained model out.

    recipes/*.yaml ── recipe.load ──> Recipe ── building ──> model, objective, attack, optimiser, schedule
    (epoch, index) ── data.Images ──> augmented image ── data.mixed ──> x, soft labels      (all randomness is keyed)
    x, labels ── attack, if there is one ──> x ── PenalizedModel (DDP) ──> total.backward() ──> clip, step, EMA
    every so often ── checkpoints.save, evaluate ──> log.jsonl

Nothing random has a state: augmentation is a function of seed, epoch and image, mixup and dropout of seed, step and
rank. A run that was killed goes on from its last checkpoint to the very weights that it would have had.
"""
