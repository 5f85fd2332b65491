"""Seeds of rows that name none: stable, spread, and blind to what is not the row's."""

from raydiff.manifest.seeds import derive_seed, derive_seeds, seed_content


def test_the_seed_of_a_row_stays_what_it_was() -> None:
    # A change here changes the images of every manifest without seeds.
    assert derive_seed({"prompt": "a lighthouse at dusk ☕", "height": 512}, 17) == 1083312693


def test_content_and_index_matter_and_num_images_does_not() -> None:
    row = {"prompt": "a lighthouse", "guidance_scale": 7.5}
    seed = derive_seed(row, 3)
    assert (
        derive_seed({"guidance_scale": 7.5, "prompt": "a lighthouse", "num_images": 4}, 3) == seed
    )
    assert derive_seed(row, 4) != seed
    assert derive_seed({**row, "guidance_scale": 7.0}, 3) != seed
    assert derive_seed({**row, "prompt": "a lighthouse "}, 3) != seed


def test_seeds_spread_over_32_bits() -> None:
    seeds = [derive_seed({"prompt": "the same"}, index) for index in range(4000)]
    assert len(set(seeds)) > 3990
    assert all(0 <= seed < 2**32 for seed in seeds)
    for bit in range(32):
        assert 1800 < sum(seed >> bit & 1 for seed in seeds) < 2200


def test_rows_of_common_settings_get_the_seeds_they_get_alone() -> None:
    settings = {"guidance_scale": 7.5, "height": 64, "num_inference_steps": 4, "width": 64}
    content = seed_content({**settings, "num_images": 2, "sampler": "euler"})
    for prompt, negative in (("a cat ☕", None), ('"', ""), ("\x00", "blurry\\")):
        texts = {"prompt": prompt} | ({} if negative is None else {"negative_prompt": negative})
        alone = derive_seed({**settings, **texts, "sampler": "euler", "num_images": 5}, 3)
        assert derive_seeds([(content, 3, prompt, negative)]) == [alone]
