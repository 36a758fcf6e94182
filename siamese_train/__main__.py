"""For torchrun, which starts modules: torchrun --nproc_per_node 4 -m siamese_train OPTIONS."""

from siamese_train.cli import train_main

train_main(prog_name="siamese-train")
