"""What is learned of the CUDA path in the first minutes on a GPU: the stages of bench/first_hour.sh, one file each.

Every stage also runs alone, ``python -m bench.first_hour.smoke``, and with ``--device cpu`` on a machine without a GPU, where
launches are pretended (bench/fake_driver.py) or, with TRITON_INTERPRET=1, interpreted. **None has been run on a GPU yet.**
"""
