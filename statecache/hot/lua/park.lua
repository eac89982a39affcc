-- Repeats in the hashes what SQL says: these instances have open dead letters.
--
-- KEYS   the meta of each partition touched. Instance keys are built from its prefix and lie in the same slot.
-- ARGV 1 items, a JSON array of [partition index, "machine:id"]
--
-- Reply  one string, a line per item:
--   OK last_id          the flag is set; last_id is the instance's last entry
--   GONE                not hot: hydration will set the flag
--   TYPE                the instance's key is not a hash of ours. Nothing written
--   EPOCH | RECOVERING | IDENTITY   not admitted: nothing written
-- Cost   about 3 us an item.
--@include identity
--@include ready_or_fenced
local here, refused, prefixes, lines = identity(), {}, {}, {}
for p = 1, #KEYS do
  refused[p] = refusal(KEYS[p], here, '')
  prefixes[p] = string.sub(KEYS[p], 1, -5) .. 'i:'
end
for n, item in ipairs(cjson.decode(ARGV[1])) do
  local key = prefixes[item[1]] .. item[2]
  local own = not refused[item[1]] and redis.pcall('HGET', key, '@')
  local kept, entry_id
  if type(own) == 'string' then kept, entry_id = string.match(own, '^(%S+ %d+ (%S+) %d+ %d+ %d+)') end
  if refused[item[1]] then
    lines[n] = refused[item[1]]
  elseif not own then
    lines[n] = 'GONE'
  elseif not kept then
    lines[n] = 'TYPE'
  else
    local others = string.gsub(string.sub(own, #kept + 2), 'p', '')
    redis.call('HSET', key, '@', kept .. ' p' .. others)
    lines[n] = 'OK ' .. entry_id
  end
end
return table.concat(lines, '\n')
