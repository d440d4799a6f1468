"""`peru chain`: the checkpoints of a training run in one folder, some stored whole, the others as changes since an earlier one."""
