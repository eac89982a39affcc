-- Changes deadlines by what was found out about their instances. Moves set and clear deadlines themselves (apply.lua); this
-- takes away one that means nothing any more, moves one that cannot be kept now, and brings one back that Redis has lost.
--
-- KEYS   the meta of each partition touched; the key of the deadlines is built from it and lies in the same slot
-- ARGV 1 items, a JSON array of [partition index, "machine:id", the deadline that was seen (ms) or "" for none, the new
--        deadline (ms) or "" for none]
--
-- Reply  one string, a line per item:
--   OK                              changed
--   KEPT                            the deadline is another one than was seen: nothing written
--   EPOCH | RECOVERING | IDENTITY   not admitted: nothing written
-- Cost   about 2 us an item.
--@include identity
--@include ready_or_fenced
local here, refused, lines = identity(), {}, {}
for p = 1, #KEYS do refused[p] = refusal(KEYS[p], here, '') end
for n, item in ipairs(cjson.decode(ARGV[1])) do
  local p, name, seen, wanted = unpack(item)
  local due = string.sub(KEYS[p], 1, -5) .. 'due'
  local score = not refused[p] and redis.call('ZSCORE', due, name)
  if refused[p] then
    lines[n] = refused[p]
  elseif (score and string.format('%.0f', tonumber(score)) or '') ~= seen then
    lines[n] = 'KEPT'
  else
    if wanted == '' then redis.call('ZREM', due, name) else redis.call('ZADD', due, wanted, name) end
    lines[n] = 'OK'
  end
end
return table.concat(lines, '\n')
