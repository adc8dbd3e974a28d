# What could not be built, for the user to read after the build's log is gone.
set(VIMDEPLOY_LIB_DIR vimdeploy/_lib)
set(VIMDEPLOY_MISSING_TEXT "")

# vimdeploy_missing(<what> <why> <what to do>)
macro(vimdeploy_missing what why remedy)
  message(WARNING "Not built: ${what}: ${why}. ${remedy}")
  string(APPEND VIMDEPLOY_MISSING_TEXT "Not built: ${what}\nBecause: ${why}.\n${remedy}\n\n")
endmacro()

function(vimdeploy_install_missing)
  set(file ${CMAKE_CURRENT_BINARY_DIR}/MISSING.txt)
  if(VIMDEPLOY_MISSING_TEXT)
    file(WRITE ${file} "${VIMDEPLOY_MISSING_TEXT}")
    install(FILES ${file} DESTINATION ${VIMDEPLOY_LIB_DIR})
  else()
    # One from an earlier, less lucky install would now be wrong.
    install(CODE "file(REMOVE \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/${VIMDEPLOY_LIB_DIR}/MISSING.txt\")")
  endif()
endfunction()
