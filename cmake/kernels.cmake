# The tree is the table: every folder of csrc/kernels is one kernel, compiled once per ISA row with that row's flags.
#   <kernel>/generic.h   compiled for every row
#   <kernel>/<row>.cpp   replaces it there
#   <kernel>/check.cpp   validates the format's sections; compiled once, for any CPU
# Each unit defines `zs::<kernel>_<row>`, an array of zs::Kernel that ends with a null name.
set(generated "${CMAKE_BINARY_DIR}/generated")
set(ZEROSKIP_KERNEL_OBJECTS "")
set(ZEROSKIP_CHECKS "")
set(declarations "")
set(entries "")
set(rows "")
set(checks "")

# One unit with one row's flags, under the law of docs/kernels.md; its table is zs::<library>.
macro(zeroskip_row_unit library unit isa flags)
  add_library(${library} OBJECT "${unit}")
  target_include_directories(${library} PRIVATE csrc)
  target_compile_options(${library} PRIVATE -Wall -Wextra -Wno-maybe-uninitialized -O3 -ffp-contract=fast -fno-exceptions -fno-rtti
                                            -fno-stack-protector -fvisibility=hidden ${flags})
  target_compile_definitions(${library} PRIVATE ZS_ISA=${isa} ZS_ROW_${isa}=1 ZS_TABLE=${library})
  list(APPEND ZEROSKIP_KERNEL_OBJECTS $<TARGET_OBJECTS:${library}>)
endmacro()

file(GLOB rooms CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/kernels/*/*.cpp") # a new <row>.cpp: configure anew
file(GLOB kernels RELATIVE "${CMAKE_SOURCE_DIR}/csrc/kernels" CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/kernels/*")
foreach(row IN LISTS ZEROSKIP_ISA_ROWS)
  string(REPLACE "|" ";" parts "${row}")
  list(GET parts 0 isa)
  list(LENGTH parts length)
  set(flags "")
  if(length GREATER 1)
    list(GET parts 1 flags)
    separate_arguments(flags UNIX_COMMAND "${flags}")
  endif()
  # Another architecture gets the scalar row alone.
  if(NOT isa STREQUAL "scalar" AND NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    continue()
  endif()
  string(APPEND rows "ROW(${isa})\n")
  foreach(room roofline attention norm pointwise lookup) # loops that are no products: <room>/loops.h, for every row
    set(unit "${generated}/${room}_${isa}.cpp")
    file(GENERATE OUTPUT "${unit}" CONTENT "#include \"${room}/loops.h\"\n")
    zeroskip_row_unit("${room}_${isa}" "${unit}" "${isa}" "${flags}")
  endforeach()
  target_compile_options("pointwise_${isa}" PRIVATE -ffp-contract=off) # its bits are those of torch's single calls
  foreach(kernel IN LISTS kernels)
    set(room "${CMAKE_SOURCE_DIR}/csrc/kernels/${kernel}")
    set(unit "${room}/${isa}.cpp")
    if(NOT EXISTS "${unit}")
      set(unit "${generated}/${kernel}_${isa}.cpp")
      file(GENERATE OUTPUT "${unit}" CONTENT "#include \"kernels/${kernel}/generic.h\"\n")
    endif()
    zeroskip_row_unit("${kernel}_${isa}" "${unit}" "${isa}" "${flags}")
    string(APPEND declarations "extern const Kernel ${kernel}_${isa}[];\n")
    string(APPEND entries "TABLE(${kernel}_${isa})\n")
  endforeach()
endforeach()
foreach(kernel IN LISTS kernels)
  list(APPEND ZEROSKIP_CHECKS "csrc/kernels/${kernel}/check.cpp")
  string(FIND "${kernel}" "_" underscore) # op_format
  math(EXPR start "${underscore} + 1")
  string(SUBSTRING "${kernel}" ${start} -1 format)
  string(APPEND checks "CHECK(${format})\n")
endforeach()
file(GENERATE OUTPUT "${generated}/kernel_declarations.inc" CONTENT "${declarations}")
file(GENERATE OUTPUT "${generated}/kernel_table.inc" CONTENT "${entries}")
file(GENERATE OUTPUT "${generated}/isa_rows.inc" CONTENT "${rows}")
file(GENERATE OUTPUT "${generated}/checks.inc" CONTENT "${checks}")
