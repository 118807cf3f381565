# The ISA rows, lowest first: the one list of them. A CPU offers a row if `csrc/isa.cpp` finds its features.
# name | compiler flags
set(ZEROSKIP_ISA_ROWS
    "scalar|"
    "avx2|-march=x86-64-v3"
    "avx512|-march=x86-64-v4 -mavx512vbmi -mavx512vbmi2 -mavx512vnni"
    "avx512bf16|-march=x86-64-v4 -mavx512vbmi -mavx512vbmi2 -mavx512vnni -mavx512bf16"
    "amx|-march=x86-64-v4 -mavx512vbmi -mavx512vbmi2 -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8")
