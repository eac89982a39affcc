-- Order of entry ids `<epoch>-<seq>`.
local function id_above(left, right)
  local e1, s1 = string.match(left, '^(%d+)-(%d+)$')
  local e2, s2 = string.match(right, '^(%d+)-(%d+)$')
  e1, e2 = tonumber(e1), tonumber(e2)
  if e1 ~= e2 then return e1 > e2 end
  return tonumber(s1) > tonumber(s2)
end
