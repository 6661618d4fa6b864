#error CU_ONLY_ON_A_GPU
